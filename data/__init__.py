"""Corpora and the code that reads them; a package so that `import data` finds this folder and not an installed one."""
