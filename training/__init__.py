"""One process, one base model: trials in, adapters and losses out. Imports no other package."""

import logging

# bitsandbytes says at import, 4-bit or not, that an optional kernel is missing: noise on every command.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
