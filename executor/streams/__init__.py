"""Where frames come from: a procedural city, recorded video, live cameras (to come). Home of PyAV."""
