"""Which leaf of a step's state is what: `assign` gives each leaf its role and its owner."""

from jzero.roles.decide import assign as assign
