"""Starting roles: options, checkpoints and engines, servers, one process or several."""
