"""``python -m flatcompress`` and ``accelerate launch -m flatcompress``: the command line."""

from flatcompress.cli.app import main

main()
