"""How engines reach a device: rows over pages in, results out."""
