"""What is not learned, behind the same protocols as adapters."""
