"""Methods of test-time adaptation. A new one: a class in one of these files, and a line here."""

from dynmoe.tta.methods.becotta import Becotta as Becotta
from dynmoe.tta.methods.cotta import Cotta as Cotta
from dynmoe.tta.methods.moetta import Moetta as Moetta
from dynmoe.tta.methods.reliable import Deyo as Deyo
from dynmoe.tta.methods.reliable import Eata as Eata
from dynmoe.tta.methods.reliable import Sar as Sar
from dynmoe.tta.methods.tent import Mgtta as Mgtta
from dynmoe.tta.methods.tent import NoAdapt as NoAdapt
from dynmoe.tta.methods.tent import Tent as Tent
