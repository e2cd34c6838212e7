"""Observers: from attention statistics to one importance score per slot."""
