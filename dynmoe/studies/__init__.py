"""Questions with a verdict. A new one: a class in one of these files, and a line here."""

from dynmoe.studies.dg import DGDiversity as DGDiversity
from dynmoe.studies.dg import DGExperts as DGExperts
from dynmoe.studies.dg import DGMethods as DGMethods
from dynmoe.studies.dg import DGParameters as DGParameters
from dynmoe.studies.dg import DGRouter as DGRouter
from dynmoe.studies.growth import DynamicAgainstStatic as DynamicAgainstStatic
from dynmoe.studies.growth import Granularity as Granularity
from dynmoe.studies.growth import GranularityCapacity as GranularityCapacity
from dynmoe.studies.growth import GrowthTiming as GrowthTiming
from dynmoe.studies.growth import Preservation as Preservation
from dynmoe.studies.growth import RLGrowth as RLGrowth
from dynmoe.studies.growth import RouterShift as RouterShift
from dynmoe.studies.shifts import AdaptiveGrowth as AdaptiveGrowth
from dynmoe.studies.shifts import Baselines as Baselines
from dynmoe.studies.shifts import BlurredBoundaries as BlurredBoundaries
from dynmoe.studies.shifts import RouterUncertainty as RouterUncertainty
from dynmoe.studies.shifts import UnknownShifts as UnknownShifts
from dynmoe.studies.tta import TTABalance as TTABalance
from dynmoe.studies.tta import TTABatchSize as TTABatchSize
from dynmoe.studies.tta import TTAExperts as TTAExperts
from dynmoe.studies.tta import TTALayers as TTALayers
from dynmoe.studies.tta import TTAMethods as TTAMethods
from dynmoe.studies.tta import TTARouter as TTARouter
from dynmoe.studies.untold import Untold as Untold
