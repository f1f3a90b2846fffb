"""Applications that come with Mycel: jobs may name them without anybody's trust."""
