"""From image files to batches on the device; `sources` begins, `batches` ends."""
