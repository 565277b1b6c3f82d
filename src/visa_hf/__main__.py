"""`python -m visa_hf`: the same as the command `visa`."""

import sys

from visa_hf.cli import main

sys.exit(main())
