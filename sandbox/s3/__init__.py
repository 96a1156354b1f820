"""An S3 server on this machine and a proxy with faults before it: for tests, and for `jobs.bench faults`."""
