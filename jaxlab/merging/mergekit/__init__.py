"""mergekit's own files: read as mergekit 0.1.5 reads them, and turned into plans of merges."""
