"""A node of ROS 2 that finds what expressions name in images."""
