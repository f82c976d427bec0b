"""How decisions are executed: frames as they arrive, stored clips, many streams; the same answers from each."""
