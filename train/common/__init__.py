"""What several of the package's tools share: files, folders, progress, plots, facts about models and machines."""
