"""The daemon: sockets, configuration, the connection host, faces."""
