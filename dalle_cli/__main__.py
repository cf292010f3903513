"""``python -m dalle_cli`` is ``dalle``."""

from dalle_cli.app import main

main()
