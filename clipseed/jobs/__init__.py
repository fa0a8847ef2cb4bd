"""What each command does, from options to report: the glue between the other rooms."""
