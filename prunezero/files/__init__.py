"""Files and bytes: atomic writes, digests, places that can be written, the cache folder."""
