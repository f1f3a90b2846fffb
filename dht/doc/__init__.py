"""Replicated documents: what a swarm wants to keep, one single-writer document for each author."""
