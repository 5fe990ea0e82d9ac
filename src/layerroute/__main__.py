"""`python -m layerroute`, the command line without an installation."""

from layerroute.cli import main

main()
