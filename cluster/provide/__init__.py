"""What the cluster's own nodes run. Standard library, ray and boto3 only: the container image has no more of our code."""
