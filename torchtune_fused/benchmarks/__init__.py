"""What the benchmark recipe measures: each section describes contests, one runner holds them."""
