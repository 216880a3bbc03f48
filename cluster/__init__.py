"""Shards and ranks as Ray actors: made, fed, replaced when they die."""
