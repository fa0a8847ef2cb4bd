"""Pictures for people: overlays of maps and masks on photographs."""
