"""Access to the Kubernetes API: kubeconfig and login, requests, reflector, leader election, Events."""
