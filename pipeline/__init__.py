"""What a run is: its request, plan, driver and record, and the commands."""
