"""easyspec beside other programs."""
