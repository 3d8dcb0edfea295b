"""`python -m colaserve_client` is the `colaserve` command."""

import sys

from colaserve_client.cli.main import main

sys.exit(main())
