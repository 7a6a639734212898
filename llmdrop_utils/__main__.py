import sys

try:
    from .cli import main

    sys.exit(main())
except KeyboardInterrupt:  # while it is imported
    sys.exit(130)
