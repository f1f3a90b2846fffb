"""The internet in memory: virtual time, links, machines, faults; whole daemons run on it."""
