"""Questions with a verdict. A new one: a class in one of these files, and a line here."""

from dynmoe.studies.cl_growth import DynamicAgainstStatic as DynamicAgainstStatic
from dynmoe.studies.cl_growth import Granularity as Granularity
from dynmoe.studies.cl_growth import GranularityCapacity as GranularityCapacity
from dynmoe.studies.cl_growth import GrowthTiming as GrowthTiming
from dynmoe.studies.cl_growth import Preservation as Preservation
from dynmoe.studies.cl_growth import RouterShift as RouterShift
from dynmoe.studies.cl_shifts import AdaptiveGrowth as AdaptiveGrowth
from dynmoe.studies.cl_shifts import Baselines as Baselines
from dynmoe.studies.cl_shifts import BlurredBoundaries as BlurredBoundaries
from dynmoe.studies.cl_shifts import RouterUncertainty as RouterUncertainty
from dynmoe.studies.cl_shifts import UnknownShifts as UnknownShifts
from dynmoe.studies.dg import DGDiversity as DGDiversity
from dynmoe.studies.dg import DGExperts as DGExperts
from dynmoe.studies.dg import DGMethods as DGMethods
from dynmoe.studies.dg import DGParameters as DGParameters
from dynmoe.studies.dg import DGRouter as DGRouter
from dynmoe.studies.rl_growth import RLGrowth as RLGrowth
from dynmoe.studies.tta import TTABalance as TTABalance
from dynmoe.studies.tta import TTABatchSize as TTABatchSize
from dynmoe.studies.tta import TTAExperts as TTAExperts
from dynmoe.studies.tta import TTALayers as TTALayers
from dynmoe.studies.tta import TTAMethods as TTAMethods
from dynmoe.studies.tta import TTARouter as TTARouter
