"""Tests that need more than a memcached: WSGI hosts, Lambda adapters, tus clients, a
browser."""
