"""What people look at: the HTML page about scored inputs, and overlays of maps and masks on photographs."""
