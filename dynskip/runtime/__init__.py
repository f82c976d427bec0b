"""How decisions are executed: frame by frame, stored clips, many streams; faster stages, and export."""
