"""Raw text to shards: inputs, filters, and the work cut into parts for any number of workers."""
