"""The job that turns caption dumps into a published index; over `smallcap`, and on Ray Data."""
