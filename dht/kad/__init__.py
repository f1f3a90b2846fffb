"""Kademlia: finding peers, small signed records, and who provides what, without anybody who knows it all."""
