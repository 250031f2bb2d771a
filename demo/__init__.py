"""Two real networks from float to int8 on the device runtime."""
