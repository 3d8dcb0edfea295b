"""`python -m colaserve_services.launch ROLE ...`: how `up --split` starts its processes."""

from colaserve_services.commands import main

main()
