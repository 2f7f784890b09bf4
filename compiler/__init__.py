"""What "compile" means: types, loading, the pipeline, the judge, the guard, the bundle, the report."""
