"""Generation with `cli_demo.py`: the videos to make, the pipeline, the record of each video, comparisons."""
