"""`python -m mixtera_hpc` is the `mixtera-hpc` command."""

import sys

from mixtera_hpc.cli.main import main

sys.exit(main())
