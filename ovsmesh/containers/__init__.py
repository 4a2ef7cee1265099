"""Drivers of what runs containers: Docker (daemon.json, its API, its restart) and CNI."""
