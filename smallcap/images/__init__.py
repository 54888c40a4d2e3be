"""Images: where they are listed, how they are cut into work, fetched and decoded."""
