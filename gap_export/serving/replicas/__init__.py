"""Replicas of the application in a Ray cluster, and the server before them.

``options`` is what users choose; ``deployment`` starts the replicas with Ray Serve; ``replica`` is
one of them, which holds the application; ``front`` lets requests in and hands them to a replica.
"""
