"""Notice data files that change while a run reads them."""
