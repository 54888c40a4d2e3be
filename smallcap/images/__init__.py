"""Images: how they are listed, cut into work, fetched and decoded."""
