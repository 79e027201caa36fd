"""From a name, a folder or a hub id to the files of a checkpoint."""
