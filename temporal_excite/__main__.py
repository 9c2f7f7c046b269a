"""``python -m temporal_excite`` is ``temporal-excite``."""

from .cli import main

raise SystemExit(main())
