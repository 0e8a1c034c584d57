"""One process, one base model: trials in, adapters and losses out. Imports no other package."""
